"""What the test suites share: running commands, toy tasks, live processes."""
