"""The one training engine: any task, any number of ranks, exact resume. Knows no network and no dataset."""
