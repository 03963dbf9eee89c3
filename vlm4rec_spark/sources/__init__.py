"""What comes in: a company's own files and tables as raw rows, and the listing of its photos."""
