"""The runtimes behind one seam: `base` is the seam, each other module one runtime, `detect` finds devices."""
