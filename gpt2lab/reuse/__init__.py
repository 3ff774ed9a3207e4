"""What finished runs are still good for: why they differ, adopting them for new code, measuring them again."""
