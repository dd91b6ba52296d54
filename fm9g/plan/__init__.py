"""Memory, disk and time that training needs, before it starts (`fm9g plan`). Arithmetic alone: no torch."""
