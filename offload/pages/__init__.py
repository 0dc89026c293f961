"""Pages of keys and values, and the tiers they lie in.

geometry           cells, spans, pages and bits
page_table         which frames hold which records: bookkeeping alone
policy             where a new extent gets its home
eviction           what a full cache gives up
pager              the page store
store_options      how it moves what it holds
tier               an arena of frames
planes             near and far planes of extents in it
hot_records        single records of the disk that are worth keeping in memory
span_reader        all spans of a layer for attention
span_addresses     where they start
record_reader      selected records for attention
record_map         where every record of a layer lies, as arrays
selected           some records of a layer: what attention over a selection reads
windows            what layers with a sliding window keep
"""
