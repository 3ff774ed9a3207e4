"""What finished runs are still good for: why they differ, replaying and adopting them, measuring them again."""
