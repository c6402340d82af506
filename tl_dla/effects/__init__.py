"""What a direct effect does not tell: effects recomputed, total and indirect, and their audit."""
