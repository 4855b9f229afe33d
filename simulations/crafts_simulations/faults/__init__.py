"""What goes wrong, made to go wrong: every line of a table is a fault and what must hold then."""
