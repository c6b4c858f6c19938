"""What a draft is worth: acceptance measured by decoding, and pictures of it."""
