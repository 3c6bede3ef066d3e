-- ARGV: lease, TTL in milliseconds.
call('ZADD', T, string.format('%.0f', now + tonumber(ARGV[2]) * 1000), 'l:' .. ARGV[1])
call('HSET', H, 'L:' .. ARGV[1], ARGV[2])
return 1
