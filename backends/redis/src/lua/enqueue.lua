-- ARGV: line, name, lease, value, depth, '1' to join only an empty line.
-- Answers nothing if the line was not empty, -1 if the lease has ended, or the token and the names ahead.
local line, name, lease = ARGV[1], ARGV[2], ARGV[3]
local field, prefix = line .. '\n' .. name, 'o:' .. line .. '\n'
local found = call('HMGET', H, 'rev', 'T:' .. field, 'L:' .. lease)
local token = found[2]
-- Who is new comes last: until it stands there, the end of the line is what is ahead of it.
local before = token and '(' .. prefix .. token .. '\n' .. name or '(o:' .. line .. '\v'
local ahead = call('ZREVRANGEBYLEX', Z, before, '[' .. prefix, 'LIMIT', 0, ARGV[5])
if token then
  call('HDEL', H, '')
elseif not found[3] then
  call('HDEL', H, '')
  return { -1 }
elseif ARGV[6] == '1' and #ahead > 0 then
  call('HDEL', H, '')
  return {}
else
  revision = revision or math.max(tonumber(found[1] or 0) + 1, now)
  token = string.format('%016.0f', revision)
  if ARGV[4] == '' then
    call('HSET', H, 'rev', token, 'T:' .. field, token)
  else
    call('HSET', H, 'rev', token, 'T:' .. field, token, 'P:' .. field, ARGV[4])
  end
  call('ZADD', Z, 0, prefix .. token .. '\n' .. name, 0, 'a:' .. lease .. '\nt' .. field)
end
for i, member in ipairs(ahead) do ahead[i] = string.sub(member, #prefix + 18) end
return { tonumber(token), ahead }
