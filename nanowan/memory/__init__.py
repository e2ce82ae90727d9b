"""Keep weights on the device or on the host, stream them from the host, and decode videos in less memory."""
