"""Speed and memory, measured against other libraries."""
