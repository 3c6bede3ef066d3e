-- ARGV: lease. Answers the TTL in milliseconds, or -1 if the lease has ended.
call('HDEL', H, '')
local ttl = call('HGET', H, 'L:' .. ARGV[1])
if not ttl then return -1 end
call('ZADD', T, string.format('%.0f', now + tonumber(ttl) * 1000), 'l:' .. ARGV[1])
return tonumber(ttl)
