"""The commands of a rank: what each prints, and on which rank."""
