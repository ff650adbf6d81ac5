"""What several tests share: small real objects, and ways to look at them."""
