"""The disk tier: scratch files, and the traffic with them.

scratch            how a scratch file begins and is swept
disk               reads and writes it
extent_file        records in it, with checksums
spill_dir          where it lies
private_dir        folders for the user alone
io_threads         the traffic with it
reads              the threads that read
transfer           wishes, demands and writes
staging            slots for what is on its way
"""
