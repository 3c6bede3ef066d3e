-- ARGV: 'one', 'prefix' or 'watch-one', 'watch-prefix'; directory; name or prefix.
-- Answers revision, the directory's mark, microseconds to the first timer, then name, meta, value for each.
call('HDEL', H, '')
local mark, timer = 0, -1
if string.sub(ARGV[1], 1, 6) == 'watch-' then
  mark, timer = observe(ARGV[2]), first_timer()
end
local base = ARGV[2] .. '\n'
local names
if ARGV[1] == 'one' or ARGV[1] == 'watch-one' then
  names = { ARGV[3] }
else
  -- Names are UTF-8, in which the byte FF never occurs.
  local from = 'i:' .. base .. ARGV[3]
  names = call('ZRANGEBYLEX', Z, '[' .. from, '(' .. from .. '\255')
  for i, member in ipairs(names) do names[i] = string.sub(member, #base + 3) end
end
local last = call('HGET', H, 'rev')
-- Nothing was ever written, or everything was deleted: what is answered now must be below what comes.
if not last then bump() end
store()
local out = { revision or tonumber(last), mark, timer }
local wanted = {}
local first = 1
while first <= #names do
  -- In pieces: Lua cannot unpack more than some thousands of arguments.
  local past = math.min(first + 1000, #names + 1)
  for i = first, past - 1 do
    wanted[2 * (i - first) + 1] = 'K:' .. base .. names[i]
    wanted[2 * (i - first) + 2] = 'V:' .. base .. names[i]
  end
  local found = call('HMGET', H, unpack(wanted, 1, 2 * (past - first)))
  for i = first, past - 1 do
    local meta, value = found[2 * (i - first) + 1], found[2 * (i - first) + 2]
    if meta then
      out[#out + 1] = names[i]
      out[#out + 1] = meta
      out[#out + 1] = value
    end
  end
  first = past
end
return out
