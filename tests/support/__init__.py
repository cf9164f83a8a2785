"""What tests share: cases, oracles, hostile inputs, backends."""
