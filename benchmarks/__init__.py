"""What dyncompress does on networks of other people: `make zoo`."""
