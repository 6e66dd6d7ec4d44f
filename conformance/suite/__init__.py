"""What pytest collects: each check as a property."""
