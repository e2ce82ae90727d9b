"""Every layout of weight files in use: read, written, converted."""
