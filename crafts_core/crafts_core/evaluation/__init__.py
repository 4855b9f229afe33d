"""How good the generator is: fidelity, alignment, drift."""
