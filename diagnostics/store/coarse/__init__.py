"""Every metric over 16, 256 and 4096 steps: pictures of long runs without reading their rows."""
