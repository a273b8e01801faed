"""`publish`: one commit of a Hub repo, with its card and licence."""
