"""Pictures, tables and the page of confusion-report; pure functions of arrays."""
