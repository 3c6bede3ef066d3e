-- Microseconds until the first timer of the namespace, or -1.
local function first_timer()
  local first = call('ZRANGEBYSCORE', T, '-inf', '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
  if #first == 0 then return -1 end
  return math.max(tonumber(first[2]) - now, 0)
end

-- Makes every later change of the directory known on its channel, for a minute.
local function observe(dir)
  local at = call('HGET', H, 'D:' .. dir)
  if not at then
    -- A fresh number, so that whoever watched before sees that there is a gap.
    at = number(bump())
    call('HSET', H, 'D:' .. dir, at)
  end
  call('ZADD', T, number(now + 60000000), 's:' .. dir)
  return tonumber(at)
end
