"""What reads a slide file: one module for each library, behind one small seam."""
