"""Keep weights on the device, on the host or streamed between them, and decode videos in less memory."""
