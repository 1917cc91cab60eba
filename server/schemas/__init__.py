"""Request and response types of the API, one file per endpoint family, and the table that classes every field."""
