"""What stages exchange: folders with a record, verified, stored, traced and removed."""
