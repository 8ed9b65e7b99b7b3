"""stagewise: train deep vision networks with local losses."""
