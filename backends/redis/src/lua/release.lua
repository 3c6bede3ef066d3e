-- ARGV: ticket, token. Takes the ticket out of its line if it stands there: what every release of a lock is.
-- Answers as commit does.
local field, token = ARGV[1], ARGV[2]
local found = call('HMGET', H, 'rev', 'T:' .. field, 'W:' .. field)
if found[2] ~= token then
  call('HDEL', H, '')
  return { 0, tonumber(found[1] or now), 0 }
end
local cut = string.find(field, '\n', 1, true)
local name = string.sub(field, cut + 1)
call('HDEL', H, 'T:' .. field, 'P:' .. field, 'W:' .. field)
call('ZREM', Z, 'o:' .. string.sub(field, 1, cut) .. token .. '\n' .. name,
  'a:' .. string.match(name, '^[^-]*') .. '\nt' .. field)
revision = revision or math.max(tonumber(found[1] or 0) + 1, now)
call('HSET', H, 'rev', string.format('%.0f', revision))
if found[3] then
  for client in string.gmatch(found[3], '%x+') do
    call('ZREM', T, 'w:' .. field .. '\n' .. client)
    redis.pcall('PUBLISH', string.sub(H, 1, -2) .. 'c:' .. client, 't' .. field)
  end
end
return { 1, revision }
