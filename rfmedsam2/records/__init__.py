"""What lies on disk: frozen, validated records. Importing this package loads neither torch nor numpy code of ours."""
