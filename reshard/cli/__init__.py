"""The `reshard` command, one file a command. Each parses, makes one library call and prints the result."""
