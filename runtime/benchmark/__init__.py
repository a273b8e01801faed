"""`bench` on a rank: what it measures, with this runtime and with those it is compared with."""
