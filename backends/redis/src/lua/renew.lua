-- ARGV: lease. Answers the TTL in milliseconds, or -1 if the lease has ended.
guard()
local ttl = call('HGET', H, 'L:' .. ARGV[1])
if not ttl then return -1 end
call('ZADD', T, number(now + tonumber(ttl) * 1000), 'l:' .. ARGV[1])
return tonumber(ttl)
