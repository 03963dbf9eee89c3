"""What comes in: the company's own files and tables as raw rows."""
