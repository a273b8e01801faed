"""The `reshard` command, one file a command: it parses, makes one library call, and prints the result."""
