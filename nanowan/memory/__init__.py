"""Where weights lie, and decoding in less memory."""
