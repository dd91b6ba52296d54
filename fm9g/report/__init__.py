"""Shows how runs went: metrics, events and configuration, as one HTML page or as a picture."""
