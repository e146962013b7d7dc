"""Records: frozen, validated contents of JSON files and checkpoint headers. Imports no torch."""
