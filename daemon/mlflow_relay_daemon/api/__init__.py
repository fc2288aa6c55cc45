"""What the daemon serves over HTTP, on one loopback port."""
