"""The command line of the runtime: what each command prints, and on which rank."""
