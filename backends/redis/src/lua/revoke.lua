-- ARGV: lease.
end_lease(ARGV[1])
store()
tell()
return 1
