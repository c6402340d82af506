"""What a user wrote, made precise."""
