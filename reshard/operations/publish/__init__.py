"""`publish`: a resharded folder as one commit of a Hub repo, with its card and licence."""
