"""Guards: whatever a stranger may have written is read here, or within the limits that stand here."""
