"""A device in a box: a booted Debian with edged's packages in it, and what an operator's day does to it."""
