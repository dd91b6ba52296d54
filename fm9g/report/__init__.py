"""How runs went: their figures, events and configuration, as one HTML page or as a picture."""
