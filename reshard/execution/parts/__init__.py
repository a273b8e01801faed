"""Parts of a conversion that several machines make: the share of each, its record, and where they are gathered."""
