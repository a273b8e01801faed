"""`bench` on a rank: measurements of this runtime, and of those it is compared with."""
