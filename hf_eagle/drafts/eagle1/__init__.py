"""The EAGLE-1/2 draft: it predicts the target's next feature, and uses the target's head."""
